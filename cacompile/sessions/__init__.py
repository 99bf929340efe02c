"""What a user holds of one compiled model: its session, saved states, where training stands."""
