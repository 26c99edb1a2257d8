"""What token budgets give and cost: reconstruction, prompt accuracy, time, memory."""
