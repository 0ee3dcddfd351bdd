"""What users ask for, checked."""
