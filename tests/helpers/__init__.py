"""What several tests share: tiny models and tasks, made-up runs, references, readers."""
