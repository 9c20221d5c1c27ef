"""How an evaluation with suites runs: its settings, what is stored, what the engine does, and the course of it all."""
