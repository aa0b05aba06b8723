"""From what a chat model wrote to its reasoning, its answer and its tool calls."""
