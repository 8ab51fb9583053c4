"""Networks in plain PyTorch: what maps (x, t, condition) to a prediction?

They know nothing of schedules, samplers, Lightning or Hydra; configs and checkpoints rebuild them from plain data.
"""
