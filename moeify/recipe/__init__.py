"""What a run is asked to do: a recipe's fields, how its text is read, and what it tells before anything is trained."""
