"""One pass over prompt and answer: what is heard on the way, and how it is reduced."""
