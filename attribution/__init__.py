"""How much does each unit matter to each category?"""
