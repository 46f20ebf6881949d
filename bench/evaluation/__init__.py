"""The evaluation on the field's benchmarks: its loops and formats, tried; and what the large recipe costs, computed."""
