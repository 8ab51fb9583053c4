"""What are samples worth? Judges that know the truth, apart from everything that trains."""
