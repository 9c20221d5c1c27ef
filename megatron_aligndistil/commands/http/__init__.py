"""OpenAI's completions and chat routes over an engine that draws tokens."""
