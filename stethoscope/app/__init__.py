"""``stethoscope app``: the page on which one looks at a model while it answers.

``answer`` lets a model answer and explains the answer, ``payload`` writes what the page receives, ``model_pool`` shares
models between users, ``pictures`` and ``runs`` read pictures and runs, ``access`` and ``sessions`` guard the server;
``ui`` and ``server`` alone need Gradio.
"""
