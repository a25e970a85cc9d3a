"""How a potential is made: data, loss, optimizer, loop, checkpoints, evaluation."""
