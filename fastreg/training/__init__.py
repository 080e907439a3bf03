"""What ``fastreg train`` runs: data, models, the training loop, and what it shows and writes.

``command`` is the command line, ``settings`` what it asks for, ``loop`` the training of one network.
A new regularizer for ``--compare`` is a function in ``regularizers``, a new network one in ``models``, a new
data set one in ``data``, a new ``--study`` one in ``studies``.
"""
