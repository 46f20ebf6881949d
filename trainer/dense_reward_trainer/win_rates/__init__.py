"""Win rates: answers of policies to a benchmark's questions, compared with a baseline's by a judge."""
