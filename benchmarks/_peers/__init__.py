"""One distillation job, done by several programs: each contender is a file here, run in a process of its own."""
