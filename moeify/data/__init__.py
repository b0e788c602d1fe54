"""Text in categories: where it comes from, how it is divided into documents, splits and tokens."""
