"""From attribution to a cut: the expert tree, who owns which unit, how wide, and the cut itself."""
