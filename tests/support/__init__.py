"""What tests share: tiny models, runs, real ranks, commands, a Slurm cluster."""
