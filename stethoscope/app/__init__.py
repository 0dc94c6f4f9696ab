"""``stethoscope app``: the screen on which one looks at a model while it answers.

``payload`` makes what the browser draws, ``asking`` lets a model answer and explains the answer, ``models`` shares
models between users, ``runs`` reads finished runs; ``screen`` and ``server`` alone need Gradio.
"""
