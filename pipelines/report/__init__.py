"""The report: one HTML file that says what a run did, for people. Made from the run's folder alone."""
