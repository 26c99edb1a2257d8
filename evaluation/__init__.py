"""Quality and cost by token budget: reconstruction, prompt accuracy, time, memory."""
