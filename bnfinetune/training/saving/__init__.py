"""What a run writes and reads again: its folder, the best network, and states to go on from."""
