"""Tool calls: schemas, chat turns, parsing, tool_choice."""
