"""The split model: every expert a rectangle of rows times units, computed by plain products over views."""
