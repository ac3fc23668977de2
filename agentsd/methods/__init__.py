"""What a phase of a schedule can do to self-attention: pure PyTorch, one file a method."""
