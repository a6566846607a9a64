"""What the training of any learned drafter needs: data, hidden states, losses, files that survive a kill."""
