"""Who teaches: one frozen model, several, the student's own past, or a cache."""
