"""How the teacher is asked for texts: it writes the questions too (Xu et al. 2024, *Magpie*), begun in many ways."""

from __future__ import annotations

OPENINGS = (
    *[""] * 4,
    "Write a short story about", "Write a story in which", "Tell me a story about", "Write a poem about",
    "Write a Python function that", "Write a Python program to", "Write a JavaScript function",
    "Write a class in Python",
    "Fix the bug in this code:\n", "Explain what this code does:\n```python\n", "Write a SQL query",
    "Write a bash script", "Convert this to JSON:",
    "Summarize the following text:\n", "Summarize this article in two sentences:\n", "Give me a summary of",
    "Answer the question based on the text:\n", "Rewrite the following paragraph",
    "Explain", "What is", "How do I", "How does", "Why does", "Who was", "What happened", "What are the benefits of",
    "Write an email to", "Write a letter", "List five", "Give me tips for", "Compare", "Translate", "Describe",
    "Solve this math problem:", "Create a plan for", "Can you help me",
)  # fmt: skip
"""Beginnings of questions. The empty one leaves everything to the teacher."""
LONG_OPENINGS = frozenset(opening for opening in OPENINGS if opening.endswith("\n") or "paragraph" in opening)
"""Beginnings that are followed by a text."""
QUESTION_TOKENS, LONG_QUESTION_TOKENS, ANSWER_TOKENS = 60, 160, 220
TEMPERATURES = (0.0, 0.0, 0.8)
"""Of answers, in turn: what a head proposes is its likeliest token, so most texts are the likeliest ones."""
