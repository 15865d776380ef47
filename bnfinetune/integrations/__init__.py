"""A place in other people's trainers: each module needs its package only when it is imported."""
