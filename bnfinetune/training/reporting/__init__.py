"""What a run shows: lines while it goes on, and a summary, figures and a page of its end."""
