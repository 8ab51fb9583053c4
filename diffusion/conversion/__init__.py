"""Models in other layouts: foreign files loaded as ours, and ours or theirs written in any layout, tensor by tensor."""
