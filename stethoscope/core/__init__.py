"""What every other package may use, and which uses none of them.

``types`` has the records that packages exchange, ``errors`` the errors that users can cause, ``component`` builds
objects from configuration, and ``token_table`` defines the table of features. ``files``, ``json_rows`` and ``images``
read and write, ``text``, ``redaction`` and ``html`` make output safe, ``digests`` and ``cache`` save work,
``picture_profile`` summarises pictures, and ``system`` handles signals, memory and the disk.
"""
