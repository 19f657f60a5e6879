"""Reading data sources into pairs, conversations, rated answers, prompts and facts."""
