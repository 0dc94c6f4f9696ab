"""``stethoscope app``: the page on which one looks at a model while it answers.

``answer`` lets a model answer and explains the answer, ``payload`` writes what the page receives, ``model_pool`` shares
models between users, ``runs`` reads finished runs; ``ui`` and ``server`` alone need Gradio.
"""
