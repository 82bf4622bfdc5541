"""Stage 5: does adding the vector change what the application model does, coherently?"""
