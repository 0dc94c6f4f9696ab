"""Reduce hallucinations: methods that change how an answer is written, or the answer afterwards."""
