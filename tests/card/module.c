/* What a driver asks of a module that was read. */

#include <stdlib.h>
#include <string.h>

#include "program.h"

void ptx_unload(ptx_module *module) {
    for (uint32_t f = 0; module && f < module->num_functions; f++) {
        ptx_function *function = module->functions[f];
        for (uint32_t i = 0; i < function->num_parameters; i++)
            free(function->parameters[i].name);
        for (uint32_t i = 0; i < function->num_registers; i++)
            free(function->registers[i].name);
        for (uint32_t i = 0; i < function->num_instructions; i++)
            free(function->code[i].text);
        free(function->parameters);
        free(function->registers);
        free(function->code);
        free(function->name);
        free(function);
    }
    if (module)
        free(module->functions);
    free(module);
}

const ptx_function *ptx_find(const ptx_module *module, const char *name) {
    for (uint32_t i = 0; i < module->num_functions; i++)
        if (strcmp(module->functions[i]->name, name) == 0)
            return module->functions[i];
    return NULL;
}

int ptx_num_parameters(const ptx_function *function) { return (int)function->num_parameters; }

uint32_t ptx_parameter_bytes(const ptx_function *function, int index) {
    return function->parameters[index].bytes;
}

uint32_t ptx_static_shared_bytes(const ptx_function *function) {
    return function->static_shared_bytes;
}

uint32_t ptx_threads(const ptx_function *function) { return function->threads; }
