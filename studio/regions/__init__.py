"""Several concepts in one picture, each in a region of its own, drawn in one pass of the network.

Every layer adds each concept's change where its region is; each region attends to its own text; regions do not look at
each other while the picture's layout forms. The idea of boxes with prompts of their own is Mix-of-Show's (Gu et al.
2023, section 3.4); residuals masked token by token make one pass enough, since low-rank changes add up.

    layout.py     what is drawn where, and what `--region` says
    masks.py      boxes and painted masks as soft masks that add up to 1, the rest being the background
    canvas.py     which mask holds where, at every size that the network works in
    layers.py     the changes of all regions at one layer
    attention.py  text by region; self-attention kept apart
    texts.py      each region's prompt, read with its own concept only
    drawing.py    all of it put on a base and taken off
"""
