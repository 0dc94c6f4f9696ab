"""How the embedded model is trained; needed only to train it again."""
