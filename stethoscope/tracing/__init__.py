"""Record attention and hidden states of one pass over prompt and answer, and reduce them to a trace."""
