"""What people look at: coordinates, attention and packing drawn, contact sheets of scenes."""
