"""What is not shown and what is not trusted: passwords, and configs that others may have made."""
