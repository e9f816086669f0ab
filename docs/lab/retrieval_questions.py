"""Tables and pictures of the questions that are asked of recall, and of what attention does there."""
