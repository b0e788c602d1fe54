"""Put a run together and run it: command line, Ray, MLflow, shipped recipes."""
