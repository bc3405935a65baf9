"""What methods learn from data before a merge: coefficients, masks. One module per method, by the method's name.

    learn.py          the frame: what is known already, the file that is written, its provenance
    task_models.py    models in memory that share the merged weights, each with its own head
    task_vectors.py   base weights and task vectors, read as often as a step asks for them

A module has `learn(setting, options) -> Learned`.
"""

from superpose.learning.learn import STATE_FOLDER, learn_first

__all__ = ["STATE_FOLDER", "learn_first"]
