"""Studies that come with moeify: one question each, asked of several arms on several seeds."""
