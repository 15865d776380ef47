"""Population statistics computed anew from data, exactly, on all ranks alike, and how far to trust them."""
