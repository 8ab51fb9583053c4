"""Weights under foreign names: two-way tables between our parameter names and those of the public codebases.

`keymap` renames with a complete report; one module a layout: `guided_diffusion`, `compvis` (ldm, sgm), `diffusers`.
"""
