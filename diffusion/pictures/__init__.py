"""What a picture says of how it was made: written in our own and in A1111's words, read in those and in ComfyUI's."""
