"""The embedded miniature Kolors: the small world it learns from, the captions of that world, and the judge of both."""
