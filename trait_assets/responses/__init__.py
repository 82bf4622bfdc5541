"""Stage 1 and 1.5: responses generated from scenarios, and vetted by a judge."""
