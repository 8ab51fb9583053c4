"""How is a model trained? Lightning modules that wire and log, and the callbacks that all of them share.

One module a trained thing (`denoiser.py`); averages, pictures, checkpoints and the progress line are callbacks.
"""
